"""What proves a running deployment from outside, over HTTP and by signals: faults, load, statistics."""

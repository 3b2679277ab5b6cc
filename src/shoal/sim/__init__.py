"""Virtual time: the scheduler and the router that serve live, driven by events instead of sockets and devices."""

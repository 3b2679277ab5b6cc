"""Where a step's time goes: a profiler's trace taken apart, and each part beside what it must do at the least."""

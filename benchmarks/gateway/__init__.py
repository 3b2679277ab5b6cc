"""The gateway under load: mock engines, an open-loop load generator, and shoal's gateway beside the Rust routers."""

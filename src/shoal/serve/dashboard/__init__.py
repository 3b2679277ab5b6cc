"""The page at /dashboard: hand-written files that need no build and no network but the gateway they come from."""

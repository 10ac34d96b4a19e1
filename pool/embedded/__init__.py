"""The front inside an application: `Pool`. Runs in the application's process, on its own event loop."""

"""The front process: sockets, admission, batching, replies and supervision. Never imports a framework."""

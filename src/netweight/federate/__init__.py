"""A federated run as processes: what a server and its clients are started with."""

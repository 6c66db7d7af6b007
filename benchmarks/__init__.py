"""What a step costs, against the plain loop of the published scripts: `make bench`."""

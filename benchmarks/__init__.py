"""What a step costs against the plain loop of published scripts (`make bench`); every method (`make bench-methods`)."""

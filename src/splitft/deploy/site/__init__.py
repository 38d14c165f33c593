"""A data owner's machine in a deployed run."""

"""Methods of the field side by side: one driver, one report."""

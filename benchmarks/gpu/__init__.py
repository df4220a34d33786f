"""Suite `gpu`: right, then fast, with the little time that a rented GPU gives. `plan.py` has the order of the steps."""

"""One module a section; what each one defines is said in :mod:`perturbkit.audit.plan`."""

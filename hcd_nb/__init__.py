"""Person re-identification without labels, by hierarchical cluster dynamics."""


def __getattr__(name):
    if name == "__version__":
        from importlib.metadata import version
        return version("hcd_nb")
    raise AttributeError(f"module 'hcd_nb' has no attribute {name!r}")

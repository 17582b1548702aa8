"""The tests; a package so that ``tests.support`` is found before a package of the same name that another project installed."""

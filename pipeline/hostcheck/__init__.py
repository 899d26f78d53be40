"""`virt-rt-check`: does this machine, and do its running guests, keep the plan?

The package imports the standard library and itself, and runs with Python 3.9 or later: it is shipped to
machines that have nothing else. Started as `virt-rt-check`, or here as `python3 -m pipeline.hostcheck`.
"""

"""What runs on a machine that is measured, and judges what it left: standard library only, Python 3.9."""

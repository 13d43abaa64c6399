"""The parts of ``speed.py``: each asks one question about the cost of dendrites."""

"""The figures that tools/plot draws, by the paper whose they are; common.py is shared."""

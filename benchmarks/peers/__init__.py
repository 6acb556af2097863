"""GAC-MS-ResNet as others would write it, to compare with.

Each file holds one network, complete and in its own names, and ``NAMES``: pairs of a pattern of our parameter names
and its replacement, with which our weights load into it.
"""

"""What stands behind exercises.py: the exercises, where they come from, and how they are checked.

catalog.py      the exercises in order, with their hints
source.py       blanks and solutions, read from minires's own source
checks.py       how a result is compared, and what is said when it is wrong
kernels.py      cases and usual mistakes of the functions of reference.py
special.py      checks of what draws random numbers, of the residual block, and of the kernels for the brave
learner.py      a learner's file: read, run and judged, in a process of its own
training.py     a training with the learner's functions beside the same with minires's
"""

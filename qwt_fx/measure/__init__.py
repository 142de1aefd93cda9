"""What a graph loses and costs: SQNR of layers and blocks, bit sensitivity, kernels, time, machine.

Read `measure.py` first. Nothing here changes the graph it is given.
"""

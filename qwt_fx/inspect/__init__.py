"""The report and the page: figures others have measured, put in order.

Read `report.py` first. Nothing is measured here.
"""

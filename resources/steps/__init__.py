"""The asset graph, written once: for each asset what it is made of, how, and what can be said of it beforehand.

Assets, the planner and `refinery bench` all walk these steps. See `graph` for their order.
"""

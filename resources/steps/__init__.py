"""The asset graph, written once: for each asset its inputs, how it is made, and what a plan can know of it.

Assets, the planner and `refinery bench` all walk these steps. See `graph` for their order.
"""

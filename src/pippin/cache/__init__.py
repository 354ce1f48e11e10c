"""Where K and V lie: slots and pages (slots.py), which prefixes are in them (radix.py), the arrays (pool.py)."""

"""Gated delta rule: linear attention that erases before it writes."""

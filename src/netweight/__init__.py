"""Netweight: the lightest model that provably still does the job."""

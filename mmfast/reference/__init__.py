"""Plain torch: every op as its formula is written; the fallback on any machine and the oracle in tests."""

"""Mutation testing of the core: one small change at a time. See docs/design/mutants.md."""

"""Is a path's answer right (rules, then a judge), and how good is its reasoning (scores)."""

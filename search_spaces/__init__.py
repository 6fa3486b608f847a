"""What a sweep searches: domains over configuration paths, their grammar, the catalog and the checks. No torch."""

def refuse(rest):
    if rest:
        raise NotImplementedError(f"Nobody has read this yet: {rest}")

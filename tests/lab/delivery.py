"""What Salt returned for the states of an apply, in short."""


def wrong(states):
    """Return the states that failed, or the text that came in their place."""
    if not isinstance(states, dict):
        return states
    return {tag: state["comment"] for tag, state in states.items() if state["result"] is not True}


def changed(states):
    """Return the states that changed something, with what."""
    return {tag: state["changes"] for tag, state in states.items() if state["changes"]}

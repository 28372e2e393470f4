"""Ways to damage a checkpoint of golden codes."""

import torch

DAMAGES = ["dtype", "missing", "shape", "sign", "stored", "range"]


def damaged(state, change):
    """Damage the layer "0" of a state_dict."""
    if change == "dtype":
        state["0.stored"] = state["0.stored"].float()  # the seed's second error: "quantized" tensors in float32
    elif change == "missing":
        del state["0.log_max"]
    elif change == "shape":
        state["0.sign"] = state["0.sign"][:-1].clone()
    elif change == "sign":
        state["0.sign"][3, 4] = 0
    elif change == "stored":
        state["0.stored"][3, 4] = 0
    else:
        state["0.log_min"] = torch.tensor(float("nan"))
    return state

"""A pruned model at no cost: two of every four weights removed by magnitude."""


def prune_2_of_4(model):
    """Remove the two smallest of every four weights of the decoder blocks' matrices, in place.

    :param model: LLaDA
    :return: the same model
    """
    for name, weight in model.named_parameters():
        if ".blocks." in name and weight.dim() == 2:
            groups = weight.data.view(-1, 4)
            smallest = groups.float().abs().topk(2, largest=False).indices
            weight.data = groups.scatter(1, smallest, 0).view(weight.shape)
    return model

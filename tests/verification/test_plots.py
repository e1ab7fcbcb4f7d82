"""Figures of the report with names that matplotlib could misread."""


def test_names_of_module_types_are_no_formulas(tmp_path):
    from matplotlib.figure import Figure

    from sinkprune_plugin.verification.plots import _sparsity

    figure = Figure()
    name = "a$_$b"
    _sparsity(figure.subplots(), {"sparsity": {"by_type": {name: {}}, "by_block": {"0": {name: {"sparsity": 0.5}}}}})
    figure.savefig(tmp_path / "sparsity.png")

"""The backends: a package each, which says where it runs (`why_not(device)`), with one module an op.

What a backend's modules offer is the same for all (the values are those of vig_kernels/problem.py):

    linear_nll.forward(problem, stats) -> (nll, {stat: (N,) tensor})
    linear_nll.backward(upstream, saved, problem, needs) -> (grad_hidden, grad_weight, grad_bias)
    linear_vig.forward(problem, hidden_null) -> (vig, nll_image, nll_null)
    linear_cross_entropy.forward_backward(problem, row_weight, z_loss, needs) -> (loss_sum, *gradients of it)
    gaussian_blur.forward(images, gaussian, out) -> out

Where a backend's linear_cross_entropy has `kept_rows(problem, needs, budget)`, its forward_backward takes a budget in
bytes too and may return a block of `kept_rows` rows instead of the weight's gradient, which `weight_gradient` forms.
"""

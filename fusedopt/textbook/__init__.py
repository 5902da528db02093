"""The optimization chapter of "Dive into Deep Learning", run on this package: `python -m fusedopt.textbook --help`.

    trace      the two-dimensional runs on f(x) = a x₁² + b x₂²: the printed lines, and the paths on the contours
    train      linear regression on the airfoil data: the losses, over many seeds and beside torch.optim
    stability  ill-conditioning: the largest stable learning rate, and a map of where each optimizer converges
    average    exponential moving averages: weights, effective window, bias correction

To be read beside the book: `forms` has its updates, one function each. Its letters, and torch's names for them:

    x         a parameter
    g         its gradient, ``param.grad``
    η         learning rate, ``lr``
    β, γ      of momentum, ``momentum``; of RMSProp, ``alpha`` (editions of the book differ in the letter)
    ρ         of AdaDelta, ``rho``
    β₁, β₂    of Adam, ``betas``
    ε         ``eps``
    m, v      momentum, ``momentum_buffer``; Adam's average of gradients, ``exp_avg``
    s         sum of squared gradients, AdaGrad's ``sum``; their average, ``square_avg`` or Adam's ``exp_avg_sq``
    Δ         AdaDelta's average of squared steps, ``acc_delta``
    t         number of steps taken, ``step``
    λ, κ      an eigenvalue of the Hessian; the condition number, the largest λ over the smallest
"""

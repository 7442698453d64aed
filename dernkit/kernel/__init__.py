"""Pure tensor code: what executes every plan. No I/O, no transformers; imports only types, errors and api.

==============  =========================================================================
`selection`     which experts stay; what a model allows
`matching`      best cosine of every segment among others, exact ties, bounded memory
`one_to_one`    one-to-one matchings of the greatest total affinity
`correlation`   activations as vectors whose cosines are correlations
`symmetry`      changes of a neuron that leave its output as it is
`clustering`    spherical weighted k-means (DERN, arXiv 2509.10377, step 3)
`averaging`     arrivals averaged into their partners, linearly or along an arc
`weights`       what experts weigh in averages, shares of them that move
`ridge`         ridge regression in closed form
`segments`      segments back into gate, up and down tensors
`outputs`       what experts and neurons do on sampled inputs
`layer_error`   how far a compressed layer's output is from the original's
`contracts`     the laws of components, and the sentence that says who broke one
`calls`         the one place where components are called and held to them
`planning`      scores, kept experts and moves of one layer
`compress`      carry out a plan on one layer
`statistics`    calibration sums of one layer, batch by batch
`packing`       text into token sequences of one length
`seeding`       generators that depend on nothing but a seed and a place
==============  =========================================================================

One more shape letter: *flat* is P·D, a segment's parts laid end to end.
"""

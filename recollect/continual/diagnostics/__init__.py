"""What routed experts do with old tasks: collisions, probes, alignment of gradients, spectra (`--diagnostics`).

    factors         which old examples are looked at, and the factors of each of their tokens
    watching        one pass over them: losses, routes, router inputs
    n_eff_report    compositions a route collects
    forgetting      whether routes that collect more lose more
    probes          which factor can be read from which slice of the router's input
    alignment       whether compositions that share a route pull the experts the same way
    spectra         how far the experts differ, in weights and gradients
    rounds          all of it after one task, in files
    section, panels what the report says and shows

Diagnostics, never guarantees: a route with a high N_eff need not lose anything.
Source: moe_lora 5, sd_moe 5.
"""

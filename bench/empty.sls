# As good as nothing: what a state.apply costs whatever it does (bench/converged.py).
nothing:
  test.nop

"""The operator in Triton. Importing this needs triton; `supra_kernels` does it when the form is first used."""

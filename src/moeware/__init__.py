"""moeware: ONNX mixture-of-experts transformers on FPGAs, exact to the last bit."""

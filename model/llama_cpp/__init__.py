"""Students as one GGUF file, for the variants whose mathematics llama.cpp's graphs have."""

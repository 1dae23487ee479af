"""Operations with a backward of their own, each under the name of the plain definition that its test compares it with."""

"""The engines that compete (`specs`), the interface of their runtimes (`interface`), and a folder for each runtime."""

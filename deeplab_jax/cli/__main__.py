from deeplab_jax.cli.main.main import main

if __name__ == "__main__":
    main()

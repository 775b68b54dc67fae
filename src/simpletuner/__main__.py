from simpletuner.cli import main

if __name__ == "__main__":
    main()

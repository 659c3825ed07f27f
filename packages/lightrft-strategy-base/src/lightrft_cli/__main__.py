"""`python -m lightrft_cli`."""

from lightrft_cli.main import app

if __name__ == "__main__":
    app(prog_name="lightrft")

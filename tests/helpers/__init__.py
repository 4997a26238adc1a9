"""What tests share: models made on the spot, data, runners, a browser."""

"""From any traced function to its channel groups; knows no plan."""

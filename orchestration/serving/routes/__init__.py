"""The routes: each module has `router(service)`, the routes of one matter."""

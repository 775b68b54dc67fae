"""REST routes, one file per resource, each with a `router`.

A route translates between HTTP and a service; the work is done by the modules in the parent
package.
"""

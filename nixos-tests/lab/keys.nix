# Signing keys, used only in these tests.
{
  one = {
    secret = "one.example.org-1:SBC7pXYW21eJVRE01J6CsU6SgiBJRnjCgqDxalrAMe0CHycoYmfL9VarmMOiO3Vu23qzWh9rOAAEHnv2CP1M7g==";
    public = "one.example.org-1:Ah8nKGJny/VWq5jDojt1btt6s1ofazgABB579gj9TO4=";
  };
  two = {
    secret = "two.example.org-1:63tRSN/SpnZOSwDcTJRN7OcJg5q8IVNw3ccvZQn6QsrzgNjc+1D080J/GtZnqu+k6+wRuPjj3cUVv2WwML2e+g==";
    public = "two.example.org-1:84DY3PtQ9PNCfxrWZ6rvpOvsEbj4493FFb9lsDC9nvo=";
  };
}
